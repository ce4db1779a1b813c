"""Leave-one-domain-out studies of low-bit training: the code that the scripts beside this folder share.

A study holds one domain out, trains on the others with each method, and measures accuracy on the held-out domain.

    study               methods, mini-batches, training, evaluation, model selection
    report              results.json, the table, and what a difference means at this number of runs
    options             the command line
    conflict            both gradients of every scale, recorded and drawn
    deployment          the trained network as an ONNX file, run in onnxruntime

    digit_study         the digit study: one held-out domain with one seed
    digit_domains       its four domains, from files inside scikit-learn and matplotlib
    small_resnet        its network

    image_folder_study  the study on PACS and DomainNet
    image_folders       their images, in DomainBed's layout
    resnet50            their network, from ImageNet weights
    torchvision_import  torchvision beside any build of torch
"""
