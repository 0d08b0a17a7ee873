"""Array functions. Private: what is public is re-exported by `eqx_paged`."""
