"""Networks and the numbers for them: drawn at random, well-known architectures, worked examples."""
