"""The decoder: attention, router, experts, dispatch, and the transformer that joins them."""
