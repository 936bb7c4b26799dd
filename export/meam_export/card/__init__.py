"""The model card of a policy folder: filled from the folder, and from what `meam eval` measured."""
