"""What can go wrong, and what happens then: each test brings one fault about and checks the outcome."""
