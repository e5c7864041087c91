const int thread_at = threadIdx.x;
const int group_x = blockIdx.x, group_y = blockIdx.y, group_z = blockIdx.z;
