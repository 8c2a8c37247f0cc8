"""python -m tests.versions: prints the table, exits with 1 if a row fails."""

import tests.versions
from tests.support.tables import program
from tests.versions.matrix import run_matrix, table

if __name__ == "__main__":
    program(tests.versions.__doc__, run_matrix, table)
