"""Experiments of Nguyen, Bréchet, Mondelli 2021, "When Are Solutions Connected …?", section 5."""
