"""What can be typed after `star-jax`? One module per command."""
