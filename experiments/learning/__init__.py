"""Does a method help? The same short run with and without it, several seeds each: run.py."""
