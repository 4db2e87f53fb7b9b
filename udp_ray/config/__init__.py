"""All settings, and the command line that reads them."""
