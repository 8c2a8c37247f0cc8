"""python -m tests.parity: prints the table, exits with 1 if a row fails."""

import tests.parity
from tests.parity.matrix import run_matrix, table
from tests.support.tables import program

if __name__ == "__main__":
    program(tests.parity.__doc__, run_matrix, table)
