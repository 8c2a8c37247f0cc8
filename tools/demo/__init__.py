"""Run the whole workflow on made-up data with known mistakes, as a user would, and write an HTML report.

A small Llama is fine-tuned on examples of which many are wrong, and then corrected with preference pairs. DPO trains
the guidance model. TGDPO, with tensor and pipeline parallelism on four processes, trains the result. Every program runs
as a process of its own. The commands are printed and can be run by hand.
"""
