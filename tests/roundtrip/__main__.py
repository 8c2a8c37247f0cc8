"""python -m tests.roundtrip: prints the table, exits with 1 if a row fails."""

import tests.roundtrip
from tests.roundtrip.table import run, table
from tests.support.tables import program

if __name__ == "__main__":
    program(tests.roundtrip.__doc__, run, table)
