"""What `fit` needs besides Keras: the loss, the metrics, and the data."""
