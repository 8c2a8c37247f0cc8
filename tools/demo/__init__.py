"""The whole product on made-up data with known mistakes, the way a user runs it, ending in an HTML report.

A small Llama is fine-tuned on examples of which many are wrong, then repaired with preference pairs: DPO gives the
guidance model, TGDPO (tensor × pipeline parallel, four processes) the result. Every program is started as a process
of its own; the commands are printed and can be run by hand.
"""
