"""When a token has looped enough: gate arithmetic and exit policies, pure functions on arrays."""
