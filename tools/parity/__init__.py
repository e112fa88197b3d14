"""Parts of tools/check_parity.py; tests use them too."""
