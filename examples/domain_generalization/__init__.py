"""Leave-one-domain-out studies of low-bit training: what the scripts beside this folder have in common.

Every study holds one domain out, trains on the others with each method, and measures on the domain it never saw.

    digits          four domains of digits from files that ship with scikit-learn and matplotlib
    networks        the small residual network for them
    folders         DomainBed's image folders (PACS, DomainNet)
    study           methods, mini-batches, training, evaluation, model selection
    digit_study     one cell of the digit study: a held-out domain with one seed
    vision          torchvision, beside any torch
    resnet          ResNet-50 from ImageNet weights
    imagenet_study  the study with it on image folders
    conflict        the two gradients of every scale, recorded and drawn
    deployment      the trained network as an ONNX file, measured in onnxruntime
    report          records, table, and what a difference means at this number of runs
    options         what the command lines have in common
"""
