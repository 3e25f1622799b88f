"""PPO in JAX that learns ALOHA peg insertion from camera pixels."""
