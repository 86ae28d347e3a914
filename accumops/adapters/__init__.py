"""The only rooms that name a private member of Keras or TensorFlow."""
