"""What a cache or a run says when it is asked: gaps and drift of features, displacement, samples, judges."""
