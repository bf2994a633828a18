"""When a token has looped enough: gate arithmetic and the exit rule, pure functions on arrays."""
