"""What a model costs and how far it is from the dense one: multiply-adds, speed, memory, distance, accuracy."""
