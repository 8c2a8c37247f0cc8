"""Token-level guided preference optimisation on Megatron-Core."""

from tgdpo_megatron.errors import UserError, refuse_import
from tgdpo_megatron.platform.versions import check_python

__version__ = "0.1.0"

try:
    check_python()
except UserError as error:
    refuse_import(error)
