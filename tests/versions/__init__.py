"""Every megatron-core and Python that this project accepts, each in an environment of its own.

Makes the environments below .venv-versions, as uv's hard links of one copy; those that are there already are made
equal to the locks. In each it runs the unit tests, parity at the layouts of `make test`, conversion, continuing a run,
checkpoints of other programs, and what a megatron-core does with two settings that gave wrong numbers in earlier ones.
Each writes checkpoints, which all read. Beside each, a clean environment gets what `pip install .` installs. Pythons
are looked for on the PATH. A row that could not be run has failed.
"""
