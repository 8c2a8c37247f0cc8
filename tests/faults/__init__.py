"""What goes wrong, and what is said: bad inputs, each with its sentence.

python -m tests.faults [--only TEXT] [--json FILE] [PART ...]
"""
