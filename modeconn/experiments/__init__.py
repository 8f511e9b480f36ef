"""The experiments of Nguyen, Bréchet, Mondelli 2021, "When Are Solutions Connected in Deep Networks?", section 5."""
