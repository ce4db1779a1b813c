"""Leave-one-domain-out studies of low-bit training: the code that the scripts beside this folder share.

A study holds one domain out, trains on the others with each method, and measures accuracy on the held-out domain.

    study/              the runner: settings, methods, training, jobs, the table, the command line
    conflict            both gradients of every scale, recorded and drawn
    deployment          trained networks as ONNX files, run in onnxruntime

    digit_study         the digits as a data set
    digit_domains       their four domains, from files inside scikit-learn and matplotlib
    small_resnet        their network

    image_folder_study  PACS, VLCS, OfficeHome, TerraIncognita and DomainNet as data sets
    image_folders       their images, in DomainBed's layout
    augmentation        DomainBed's augmentation
    image_cache         decoded images on disk
    resnet50            their network, from ImageNet weights
    torchvision_import  torchvision beside any build of torch
"""
