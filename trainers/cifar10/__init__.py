"""Image classification: CIFAR-10, any folder-per-class images, or drawn shapes."""
