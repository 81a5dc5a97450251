"""The faults that the checks must catch: each is planted into a live engine, judged like any run, and mended.

``campaign`` runs them; importing it, and not this package, imports jax.
"""
