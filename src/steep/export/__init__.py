"""Results handed on: a merged model, an adapter, the gate between them and the run, the card that goes with them."""
