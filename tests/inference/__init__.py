RUN = ("model=lenet5", "trainer.accelerator=cpu", "trainer.precision=32-true")
"""Overrides of the runs that these tests train."""
