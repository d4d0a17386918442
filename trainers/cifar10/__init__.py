"""The task `cifar10`: image classification on CIFAR-10, on any folder of images by class, or on drawn shapes."""
