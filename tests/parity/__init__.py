"""The layout matrix: every layout, and every method, gives what one process gives.

    python -m tests.parity [--only TEXT] [--json FILE]

formulas.py: each method's loss of a pair, written out again. oracle.py: what HuggingFace's Llama in one process makes
of it. rows.py: which layouts and methods are compared, and how closely. ranks.py: one rank of a layout. matrix.py: all
of it, as a table.
"""
