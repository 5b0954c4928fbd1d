"""The loss engine: softmax cross-entropy of linear scores, forward and backward, the scores never materialised."""
