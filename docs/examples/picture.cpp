// An image in C++ with OpenVINO alone, from picture.onnx of a bundle that `fastldm export --whole-picture` wrote:
//     python picture_request.py default ./bundle "a red apple" > request.txt
//     OV=$(python -c "import openvino, pathlib; print(pathlib.Path(openvino.__file__).parent)")   # of pip install openvino
//     g++ -O2 -std=c++17 picture.cpp -I$OV/include $OV/libs/libopenvino.so.* -Wl,-rpath,$OV/libs -o picture
//     ./picture ./bundle request.txt 7 apple.ppm
// The seed's noise is that of torch.randn on a CPU, so that the image is that of fastldm.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <openvino/openvino.hpp>
#include <random>

struct Array { ov::Shape shape; std::vector<float> numbers; };

std::vector<float> randn(std::mt19937& bits, size_t count) {  // at least 16 numbers
    std::vector<float> out(count);
    auto uniform = [&] { return (bits() & 0xffffff) / 16777216.0f; };
    auto normal = [&](size_t start) {
        for (size_t k = start; k < start + 8; k++) {
            float radius = std::sqrt(-2 * std::log(1 - out[k])), angle = float(2 * M_PI) * out[k + 8];
            out[k] = radius * std::cos(angle), out[k + 8] = radius * std::sin(angle);
        }
    };
    std::generate(out.begin(), out.end(), uniform);
    for (size_t k = 0; k + 16 <= count; k += 16) normal(k);
    if (count % 16) std::generate(out.end() - 16, out.end(), uniform), normal(count - 16);
    return out;
}

int main(int, char** argv) {
    std::map<std::string, Array> inputs;
    std::ifstream request(argv[2]);
    for (auto [name, rank] = std::pair<std::string, size_t>(); request >> name >> rank;) {
        auto& [shape, numbers] = inputs[name] = {ov::Shape(rank), {}};
        for (auto& size : shape) request >> size;
        numbers.resize(ov::shape_size(shape));
        for (auto& number : numbers) request >> number;
    }
    auto &size = inputs["size"].numbers, &draws = inputs["draws"].numbers;
    size_t c = size[0], h = size[1], w = size[2], latents = c * h * w;
    std::mt19937 bits(std::stoul(argv[3]));
    Array noise{{1, c, h, w}, randn(bits, latents)}, zeros{{1, c, h, w}, std::vector<float>(latents)};
    Array added{{draws.size(), 1, c, h, w}, {}};
    for (float draw : draws) {
        auto drawn = draw ? randn(bits, latents) : zeros.numbers;
        added.numbers.insert(added.numbers.end(), drawn.begin(), drawn.end());
    }
    for (auto& number : noise.numbers) number *= inputs["scale"].numbers[0];
    inputs.insert({{"latents", noise}, {"anchor", zeros}, {"init", zeros}, {"init_noise", zeros}, {"noises", added}});
    inputs["history"] = {{1, 4 * c, h, w}, std::vector<float>(4 * latents)};
    inputs["mask"] = {{1, 1, h, w}, std::vector<float>(h * w, 1)};
    inputs["rescale"] = {{1}, {0}}, inputs["decode"] = {{1}, {1}};
    ov::Core core;
    auto model = core.read_model(std::string(argv[1]) + "/picture.onnx");
    std::map<ov::Output<ov::Node>, ov::PartialShape> shapes;
    auto of = [&](const ov::Output<const ov::Node>& port) -> Array& {  // one of its names is the input's
        for (auto& name : port.get_names()) if (inputs.count(name)) return inputs[name];
        throw std::runtime_error("no input " + port.get_any_name());
    };
    for (auto& port : model->inputs()) shapes[port] = of(port).shape;
    model->reshape(shapes);
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto run = compiled.create_infer_request();
    for (auto& port : compiled.inputs()) {
        ov::Tensor tensor(port.get_element_type(), of(port).shape);
        auto& numbers = of(port).numbers;
        if (port.get_element_type() == ov::element::f32) std::copy(numbers.begin(), numbers.end(), tensor.data<float>());
        else std::copy(numbers.begin(), numbers.end(), tensor.data<int32_t>());
        run.set_tensor(port, tensor);
    }
    run.infer();
    auto image = run.get_tensor("image");
    size_t height = image.get_shape()[2], width = image.get_shape()[3], area = height * width;
    std::ofstream file(argv[4], std::ios::binary);
    file << "P6 " << width << " " << height << " 255\n";
    for (size_t k = 0; k < 3 * area; k++)
        file.put(std::nearbyint(std::clamp(image.data<float>()[k % 3 * area + k / 3] / 2 + 0.5f, 0.0f, 1.0f) * 255));
}
