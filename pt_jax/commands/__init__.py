"""What the commands of ``pt-jax`` do: for each a record of its options, and a function of that record."""
