// Prints the class of each image: classify network.onnx images.raw
// images.raw holds the float32 values of the preprocessed images, one after the other.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <openvino/openvino.hpp>

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: classify network.onnx images.raw\n";
        return 2;
    }
    ov::Core core;
    // Exact float32 around the integers, also where the processor has bfloat16.
    auto precision = ov::hint::inference_precision(ov::element::f32);
    auto network = core.compile_model(argv[1], "CPU", precision);
    auto request = network.create_infer_request();

    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    ov::PartialShape shape = network.input().get_partial_shape();  // [?,3,8,8]
    shape[0] = 1;
    size_t one_image = ov::shape_size(shape.to_shape());
    size_t count = bytes.size() / sizeof(float) / one_image;
    shape[0] = count;

    ov::Tensor images(ov::element::f32, shape.to_shape(), bytes.data());
    request.set_input_tensor(images);
    request.infer();

    ov::Tensor scores = request.get_output_tensor();
    size_t classes = scores.get_shape()[1];
    for (size_t i = 0; i < count; ++i) {
        const float* row = scores.data<float>() + i * classes;
        std::cout << std::max_element(row, row + classes) - row << "\n";
    }
}
