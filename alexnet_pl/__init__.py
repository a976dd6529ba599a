"""AlexNet in PyTorch Lightning: train it, take it apart, check the 2012 paper's claims."""
