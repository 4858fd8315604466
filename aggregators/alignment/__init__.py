"""Methods that bring clients into one basin before they are merged."""
