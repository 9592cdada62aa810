"""Document-grounded response generation: data, training, evaluation. Run as `python -m examples.dialogue.COMMAND`."""
