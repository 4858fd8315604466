"""Methods that treat the merged model as a step and take it with a server-side optimiser."""
