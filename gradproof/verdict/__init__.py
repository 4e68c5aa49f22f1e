"""Is a run right, and if not, which layer is wrong and what is the likely mistake?"""
