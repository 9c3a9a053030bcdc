"""What a run says about itself: facts, the model card, pictures, and the report page."""
