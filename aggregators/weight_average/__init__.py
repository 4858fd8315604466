"""Methods that average models of one basin, each parameter with its own weight."""
