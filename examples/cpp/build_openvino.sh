# Compiles classify_openvino.cpp with headers and libraries of `pip install openvino`.
OPENVINO=$(python -c 'import openvino; print(openvino.__path__[0])')
LIBRARY=$(cd "$OPENVINO/libs" && ls libopenvino.so.*)
g++ -O2 -std=c++17 classify_openvino.cpp -o classify \
    -I"$OPENVINO/include" -L"$OPENVINO/libs" -l:"$LIBRARY" -Wl,-rpath,"$OPENVINO/libs"
