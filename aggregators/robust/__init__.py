"""Methods that bound what one bad client can do."""
