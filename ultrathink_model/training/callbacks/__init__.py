"""What happens around the steps of training: each a small part of its own."""
