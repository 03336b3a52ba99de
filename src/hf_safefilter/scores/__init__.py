"""One published score a file; `base` has the contract and `registry` the names."""
