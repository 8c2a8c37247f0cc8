"""The token-credit benchmark."""
