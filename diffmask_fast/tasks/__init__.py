"""The experiments: data, model, recipe and one function that runs it all."""
