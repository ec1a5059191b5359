"""Is a model measured correctly, and does it behave as mean-field theory predicts?"""
