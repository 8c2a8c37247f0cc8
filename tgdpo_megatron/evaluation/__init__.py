"""What a model's answers are worth: answer files for public benchmarks, and comparisons of models with intervals."""
